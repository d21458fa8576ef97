"""``python -m oneshot_fast.toy train|assign|sft|direct_sft|em``: every idea in minutes."""

import functools
import sys
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import OmitSubcommandPrefixes, subcommand

from oneshot_fast.cli import run_command
from oneshot_fast.recipes.toy import commands


@dataclass(frozen=True)
class ToyCommand:
    """Small label-conditioned one-step generators, trained in minutes on a CPU.

    train first; assign and then sft (or direct_sft), or em, are the package's own commands on it.
    """

    command: OmitSubcommandPrefixes[
        Annotated[commands.TrainCommand, subcommand("train")]
        | Annotated[commands.AssignToyCommand, subcommand("assign")]
        | Annotated[commands.SftToyCommand, subcommand("sft")]
        | Annotated[commands.DirectSftToyCommand, subcommand("direct_sft")]
        | Annotated[commands.EmToyCommand, subcommand("em")]
    ]


def execute(command: ToyCommand) -> int:
    """Run the chosen command; see ``run_command`` for exit codes."""
    return command.command.execute()


main = functools.partial(run_command, "toy", ToyCommand, execute)

if __name__ == "__main__":
    sys.exit(main())
