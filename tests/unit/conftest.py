"""Property tests draw the same examples each time, and do not fail because a machine is busy."""

from hypothesis import settings

settings.register_profile("steady", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("steady")
