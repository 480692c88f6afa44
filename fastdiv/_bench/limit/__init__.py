"""The yardstick: a plain, hand-vectorised loop of each loss, compiled on the spot."""
