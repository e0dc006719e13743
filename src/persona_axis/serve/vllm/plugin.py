"""The entry point, ``vllm.general_plugins``: what vLLM calls in every process before it does anything else.

vLLM only logs a plugin that fails to *import*, and then serves without it; an error *raised when it is called* ends the
process. So this module imports nothing but the standard library, and everything that can fail, does so in
:func:`register`.
"""

from __future__ import annotations

import os

_registered = False


def register() -> None:
    """Put the plugin into this process; again is nothing. ``PERSONA_AXIS_DISABLE=1`` leaves vLLM as it is.

    Raises:
        UsageError: the environment asks for something that cannot be, or this vLLM is not one the plugin knows.
        StorageError: a policy cannot be read.
    """
    global _registered
    if _registered or os.environ.get("PERSONA_AXIS_DISABLE") == "1":
        return
    from persona_axis.serve.vllm import install

    install.install()
    _registered = True
