"""The command line ``mllm-crossget``.

In: the words behind the program's name. Out: an exit status. To be read in this order: ``commands`` (the table),
``command_line`` (from words to a call), ``option_names`` (a mistyped option is told before anything heavy is imported),
``completion`` (the shell's).
"""

from mllm_crossget.cli.command_line import main, parse_command
from mllm_crossget.cli.commands import COMMANDS, Command

__all__ = ["COMMANDS", "Command", "main", "parse_command"]
