"""Pipeline schedules with offload: which actions, when, with how many bytes, and which to choose."""
