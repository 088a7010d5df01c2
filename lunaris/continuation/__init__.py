"""How a run goes on, or another begins from it: changed, taken back, forked. No torch at import."""
