"""Where the command line keeps what JAX compiles, so that its next run does not compile it again."""

import os
from pathlib import Path

import jax

LEAST_SECONDS = 0.1  # of compiling what is kept; JAX's own second leaves out most of what a compression needs
MOST_BYTES = 2**30  # after which what was used longest ago goes


def folder() -> Path:
    """bert-adapter in the user's cache directory: $XDG_CACHE_HOME, if that is an absolute path, or ~/.cache."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "bert-adapter"


def keep_programs() -> None:
    """JAX keeps compiled programs in `folder()`, unless a place for them was named already.

    JAX_COMPILATION_CACHE_DIR names another, and JAX_ENABLE_COMPILATION_CACHE=false none. Where nothing can be written,
    nothing is kept.
    """
    if getattr(jax.config, "jax_compilation_cache_dir") is not None:  # noqa: B009 that Pyright does not know
        return
    try:
        folder().mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(folder(), os.W_OK):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder()))
    for name, value in (
        ("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS),
        ("jax_compilation_cache_max_size", MOST_BYTES),
    ):
        if name.upper() not in os.environ:
            jax.config.update(name, value)
