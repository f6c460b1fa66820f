"""How a daemon is watched: metrics, logs, health, event-loop lag, signals. Import the module you need."""
