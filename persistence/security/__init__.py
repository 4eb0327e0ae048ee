"""Keys, tokens and sealing: what keeps a session's data from whoever it is not meant for."""
