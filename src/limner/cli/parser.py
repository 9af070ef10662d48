"""A parser whose errors are one line with what the caller probably meant, and whose help ends with examples.

Owns how errors and help look. Knows no command.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NoReturn

from limner import ranks
from limner.cli.typed import number, several_values, slip, unclosed_quote, whole
from limner.spelling import meant, no_option

__all__ = ["Parser", "add_command", "commands_of", "options_of"]


class Parser(argparse.ArgumentParser):
    """Reports an error as one line; of several processes of torchrun, one does.

    `examples` are commands as they are typed, shown at the end of `--help`.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), **options: Any) -> None:
        super().__init__(*args, **options)
        self.formatter_class = argparse.RawDescriptionHelpFormatter
        self.examples = tuple(examples)
        self.typed: list[str] = []
        if examples:
            self.epilog = "examples:\n" + "\n".join(f"  {example}" for example in examples)

    def error(self, message: str) -> NoReturn:
        if not ranks.speaks():
            ranks.exit_silently()
        self.exit(2, f"limner: {message}; see {self.prog} --help\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; what no argument takes is an error of the command it was typed for."""
        words = list(sys.argv[1:] if args is None else args)
        first = next(iter(words), "").partition("=")[0]
        if first.startswith("-") and first not in self._option_string_actions:
            for command in commands_of(self):
                if first in command._option_string_actions:
                    self.error(f"{first}: belongs behind the command, as in {command.prog} {first}")
        found, left = self.parse_known_args(words, namespace)
        if left:
            owner: Parser = getattr(found, "parser", self)
            owner.unrecognized(left, all_commands=commands_of(self))
        return found

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the words of this command, after a look at those that argparse would take for something else."""
        self.typed = list(sys.argv[1:] if args is None else args)
        has_prompt = any(action.dest == "prompt" for action in self._get_positional_actions())
        problem = slip(self.typed, self._option_string_actions, has_prompt=has_prompt)
        if problem is not None and commands_of(self) == [self]:
            self.error(problem)
        return super().parse_known_args(self.typed, namespace)

    def unrecognized(self, words: Sequence[str], *, all_commands: Iterable[argparse.ArgumentParser]) -> NoReturn:
        """End with what these words may have been meant for: a value, another option of the command, or another command."""
        own = self._get_positional_actions()
        problem = unclosed_quote(self.typed)
        if problem is None and not any(action.nargs in ("+", "*") for action in own):
            problem = several_values(self.typed, self._option_string_actions)
        if problem is not None:
            self.error(problem)
        word = words[0].partition("=")[0]
        if not word.startswith("-"):
            remedy = "leave it out"
            if any(action.dest == "prompt" for action in own):
                remedy = "quote a prompt of several words"
            elif any(action.nargs in ("+", "*") for action in own):
                remedy = f"give all {own[-1].metavar} together, before the options"
            self.error(f"{' '.join(words)!r} is not expected here; {remedy}")
        if word in self._option_string_actions:
            self.error(f"{word}: belongs behind the command, as in {self.prog} {word}")
        self.error(f"{word}: {self.prog} has no such option; {self._remedy(word, all_commands)}")

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """Return the options that a word may be short for; one that is another tool's name is told as that."""
        found: list[Any] = super()._get_option_tuples(option_string)
        word = option_string.partition("=")[0]
        if word.startswith("--") and commands_of(self) == [self]:
            options = self._option_string_actions
            if no_option(word) is not None or (len(found) > 1 and meant(word, options, near=False) is not None):
                self.error(f"{word}: {self.prog} has no such option; {self._remedy(word, ())}")
        return found

    def _remedy(self, word: str, all_commands: Iterable[argparse.ArgumentParser]) -> str:
        """Return what to do about an option that there is not: how it is called here, or who has it."""
        if (known := no_option(word)) is not None:
            return known
        arguments = {action.dest: action for action in self._get_positional_actions()}
        others = [p.prog for p in all_commands if p is not self and word in p._option_string_actions]
        near = meant(word, [*self._option_string_actions, *arguments], near=not others)
        if near in arguments:
            action = arguments[near]
            return (
                f"{action.metavar or near} stands by itself, as in {self.examples[0] if self.examples else self.prog}"
            )
        if near is not None:
            metavar = self._option_string_actions[near].metavar
            return f"did you mean {near}{f' {metavar}' if metavar else ''}?"
        return f"it is an option of {', '.join(others[:3])}" if others else "leave it out"

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Read a value; of numbers, as `limner.cli.typed` does."""
        read = whole if action.type is int else number if action.type is float else None
        if read is None:
            return super()._get_value(action, arg_string)
        try:
            return read(arg_string)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(action, str(error)) from None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse what is no choice; for a command, with the one that is spelled most like it."""
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        close = difflib.get_close_matches(str(value), choices, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        what = "a command" if isinstance(action, argparse._SubParsersAction) else "allowed"
        raise argparse.ArgumentError(action, f"{str(value)!r} is not {what}; {meant}there are {', '.join(choices)}")


def add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    *,
    help: str,  # noqa: A002
    description: str,
    examples: Sequence[str],
) -> argparse.ArgumentParser:
    """Add a command with examples of how it is typed; what is parsed has its parser as `parser`."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help, description=description, examples=examples)
    parser.set_defaults(parser=parser)
    return parser


def commands_of(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Return the parsers of commands that have no commands of their own, in the order of `--help`."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return [found for child in action.choices.values() for found in commands_of(child)]
    return [parser]


def options_of(args: argparse.Namespace) -> Collection[str]:
    """Return the options of the command that was parsed, as they are typed."""
    parser: argparse.ArgumentParser = args.parser
    return parser._option_string_actions.keys()
