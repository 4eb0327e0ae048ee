"""The memory tier: packed sessions under a budget in bytes that follows the real memory."""
