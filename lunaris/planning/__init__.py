"""What a config would cost, from its keys alone. No torch."""
