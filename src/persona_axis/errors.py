"""Every error a user can cause or meet, in one place.

Each class has a standard-library parent (so ``except ValueError`` still works), an exit code for the
command line and an HTTP status for the server. The message says what happened, where, and what to do.
A bug is never wrapped in one of these: it keeps its traceback.
"""


class PersonaAxisError(Exception):
    """Base of everything the user can act on. Exit code 1 ("failed"), HTTP 500."""

    exit_code = 1
    http_status = 500


class UsageError(PersonaAxisError, ValueError):
    """A wrong argument: unknown role, bad number, contradictory options. Exit code 2, HTTP 400."""

    exit_code = 2
    http_status = 400


class CatalogError(PersonaAxisError, ValueError):
    """A catalog file that cannot be read or breaks the format; the file is named."""

    http_status = 400


class ModelError(PersonaAxisError, RuntimeError):
    """The model cannot be loaded, or is not what the job needs (no chat template, unknown layout)."""


class TemplateError(ModelError):
    """A chat template whose content spans cannot be proven, or which does not exist."""


class NonFiniteError(PersonaAxisError, ArithmeticError):
    """NaN or infinity in an activation; the layer and the rollout are named."""


class RunConflict(PersonaAxisError, FileExistsError):
    """A run folder that belongs to another configuration; the differences are listed."""

    exit_code = 2
    http_status = 409


class StorageError(PersonaAxisError, OSError):
    """A file that is damaged, or could not be written (disk full, no permission)."""

    http_status = 507


class MissingDependency(PersonaAxisError, ImportError):
    """An optional package is not installed; the message holds the command that installs it."""


class JudgeError(PersonaAxisError, RuntimeError):
    """The judge cannot be used at all (unknown, not reachable, no key). Single failures are rows."""

    http_status = 502


class FitError(PersonaAxisError, ValueError):
    """Too little data for an axis (roles dropped, a disconnected design); the reason is named."""


class EvaluationError(PersonaAxisError, RuntimeError):
    """A benchmark's documents cannot be had, or its file is broken; the task is named."""


class PartialRun(PersonaAxisError):
    """The job ended but something is missing (for example failed verdicts). Exit code 3."""

    exit_code = 3
