"""Parts of the loop: EMA, signals, metrics, the watch over finite numbers, validation."""
