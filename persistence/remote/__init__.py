"""The tier that workers share: its contract, and Redis."""
