"""``python -m torch.distributed.run`` without its report of several screens: who failed goes to a file.

Started by ``detseg.engine.processes.launch`` on every machine, with ``torch.distributed.run``'s own arguments.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from typing import Any

from detseg.engine.processes import desk


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the workers and wait for them; return 0 or the exit code of the first that failed.

    Args:
        arguments: of ``torch.distributed.run``; default: those of the command line.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the launcher says it in one line
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        run.run(run.get_args_parser().parse_args(given))  # type: ignore[no-untyped-call]  # so in torch 2.14
    except ChildFailedError as error:
        failures = [
            {"rank": rank, "code": failure.exitcode, "pid": failure.pid, "time": failure.timestamp}
            for rank, failure in error.failures.items()
        ]
        _tell({"failures": failures})
        return _shell_code(error.get_first_failure()[1].exitcode)
    except SignalException as end:
        return 128 + int(end.sigval)
    except Exception as error:  # the rendezvous: no worker has been started
        _tell({"error": f"{type(error).__name__}: {error}"})
        return 1
    return 0


def _shell_code(code: int) -> int:
    """Return an exit code as a shell gives it: 128 and the signal's number where one ended the process."""
    return code if code >= 0 else 128 - code


def _tell(content: dict[str, Any]) -> None:
    desk.put("agent.json", content)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, lambda *_: None)  # meant for the workers; the default would end this process
    sys.exit(main())
