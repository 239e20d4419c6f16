"""`onegraph COMMAND …`: finds the command, runs it, and turns errors into one readable block and an exit code.

Exit codes: 0 fine, 1 the thing asked for failed or is false, 2 bad usage.
"""

from __future__ import annotations

import bdb
import sys
import traceback
from collections.abc import Callable, Sequence

from onegraph import __version__
from onegraph.cli import bench, cache, compile, config, debug, doctor, explain, run, serve, trace
from onegraph.cli.flags import UsageError
from onegraph.env import check_torch_trace
from onegraph.errors import ConfigError, OnegraphError, nearest

COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "run": (run.main, "generate text for prompts, offline"),
    "serve": (serve.main, "an OpenAI-compatible server for one model"),
    "compile": (compile.main, "compile a model ahead of time, into one file for --artifact"),
    "explain": (explain.main, "how a model is compiled: stages, ledger, pieces, config and why"),
    "bench": (bench.main, "tokens/s and latency of a model here, and where a step's time goes"),
    "cache": (cache.main, "the compile cache: what it holds, why it missed, verify, prune, clear, export, import"),
    "debug": (debug.main, "one piece alone: compare it with eager and fp64, step through it, find its code"),
    "config": (config.main, "the effective values of all settings, and why each is what it is"),
    "trace": (trace.main, "run a model or a command under TORCH_TRACE, and build a report of all that happened"),
    "doctor": (doctor.main, "check the toolchain, torch, the device and permissions"),
}


def main(words: Sequence[str] | None = None) -> int:
    """Runs a command line (without the program's name) and gives its exit code."""
    given = list(sys.argv[1:] if words is None else words)
    ours = given[: given.index("--")] if "--" in given else given  # what follows `--` is another program's
    verbose = "--verbose" in ours
    if not given or given[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if given else 2
    if given[0] in ("-V", "--version"):
        print(f"onegraph {__version__}")
        return 0
    try:
        if given[0] not in COMMANDS:
            raise UsageError(f"onegraph: there is no command {given[0]!r}; {nearest(given[0], COMMANDS)}")
        check_torch_trace()
        words = [word for word in ours[1:] if word != "--verbose"]
        return COMMANDS[given[0]][0]([*words, *given[len(ours) :]])
    except UsageError as error:
        return _failed(str(error), 2, verbose)
    except ConfigError as error:
        return _failed(f"onegraph: {error}", 2, verbose)
    except OnegraphError as error:
        return _failed(f"onegraph: {error}", 1, verbose)
    except KeyboardInterrupt:
        return _failed("onegraph: interrupted", 1, verbose)
    except bdb.BdbQuit:
        return _failed("onegraph: ended from the debugger", 1, verbose)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output is gone: nothing to tell it
        return 1
    except Exception as error:  # noqa: BLE001 - a bug is told in one block too; --verbose shows where
        last = traceback.extract_tb(error.__traceback__)[-1]
        if isinstance(error, ValueError) and last.filename.endswith("torch/_logging/_internal.py"):
            return _failed(f"onegraph: {_wrong_torch_logs(error)}", 2, verbose)
        message = f"onegraph: unexpected {type(error).__name__}: {error}\n  where: {last.filename}:{last.lineno}"
        return _failed(f"{message}\n  to do: --verbose shows more; please report it", 1, verbose)


def _wrong_torch_logs(error: ValueError) -> ConfigError:
    """Torch reads TORCH_LOGS when it is imported, and says more than a screen of what it takes."""
    hint = "TORCH_LOGS=help with any command that runs a model lists all; docs/trace.md has those that tell of onegraph"
    return ConfigError(str(error).strip().splitlines()[0], where="TORCH_LOGS", hint=hint)


def _failed(message: str, code: int, verbose: bool) -> int:
    if verbose:
        traceback.print_exc()
    print(message, file=sys.stderr)
    return code


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            f"onegraph {__version__}: a torch.compile stack for LLM inference",
            "",
            "usage: onegraph COMMAND [MODEL] [flags]",
            "",
            *lines,
            "",
            "onegraph COMMAND --help tells the flags. Example:",
            '  onegraph run --prompt "def " --max-tokens 40',
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
