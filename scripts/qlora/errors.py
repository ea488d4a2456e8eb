"""The one exception that stands for a mistake in what the user gave."""


class UserError(Exception):
    """One clear line that names the file, row or key and says what to do; shown without a traceback."""
