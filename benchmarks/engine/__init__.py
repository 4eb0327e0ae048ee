"""The engine's side of every workload: driven through its public names, as its users drive it."""
