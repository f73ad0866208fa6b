"""Errors that a user can act on."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the input, told as a sentence: what is wrong, the rule, one way out.

    Command-line verbs print it without a traceback and exit with `exit_code`.
    """

    exit_code = 2

    def __init__(self, what: str, rule: str = "", fix: str = ""):
        self.what, self.rule, self.fix = what, rule, fix
        super().__init__(" ".join(part for part in (what, rule, fix) if part))


class HostError(UserError):
    """Another process of the job is missing: no mistake in the command, which may be tried again.

    75 is what shells and schedulers know as a temporary failure (EX_TEMPFAIL of sysexits.h).
    """

    exit_code = 75


def nearest(name: str, names: Iterable[str], prefix: str = "") -> str:
    """Returns "Did you mean 'x'?" for the closest of `names`, or an empty string.

    One that begins with `name` is closest. `prefix` is written before the name.
    """
    names = list(names)
    begins = [other for other in names if len(name) > 2 and other.startswith(name)]
    close = begins or difflib.get_close_matches(name, names, n=1)
    return f"Did you mean '{prefix}{close[0]}'?" if close else ""
