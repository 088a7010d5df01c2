"""Reports of runs and sweeps: HTML pages that need no network, and pictures. No torch."""
