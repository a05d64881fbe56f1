"""The plugin `rayscheduler`."""
