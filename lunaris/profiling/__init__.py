"""Records single steps of a run with torch's profiler and says where their time went."""
