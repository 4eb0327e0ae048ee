"""What the engine is measured against, each driven as its own users drive it."""
