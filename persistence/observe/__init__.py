"""What can be said about a session and its requests: counts, durations, health. No IO."""
