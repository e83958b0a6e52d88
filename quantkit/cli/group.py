"""What all commands share: ranks that meet or leave, signals, and errors that reach a person as one line."""

import os
import signal
import sys
import traceback
import warnings
from typing import Any

import click

from quantkit import __version__, machine, progress, ranks
from quantkit.cli import streams
from quantkit.container import writable_caches
from quantkit.errors import QuantkitError, out_of_memory, printable

TOGETHER = ("make", "calibrate", "sensitivity", "quantize")  # what ranks do together; all else rank 0 does alone
RESUMING = ("make", "calibrate", "quantize", "evaluate", "compare", "publish")
INTERRUPTED, READER_GONE = 130, 141  # as shells have it


SECTIONS = {
    "From checkpoint to file": ("make", "status"),
    "The stages of make, each by itself": (
        *("families", "inspect", "hardware", "recipes", "plan", "calibrate", "sensitivity", "quantize"),
        *("verify", "certify", "evaluate", "compare", "report"),
    ),
    "With a finished file": ("run", "serve", "export-kt", "publish"),
}


def _level(name: progress.Level, short: str, text: str) -> click.Option:
    def chosen(_: click.Context, __: click.Parameter, value: bool) -> None:
        if value:
            progress.set_level(name)

    return click.Option([f"-{short}", f"--{name}"], is_flag=True, expose_value=False, callback=chosen, help=text)


class Commands(click.Group):
    """A QuantkitError is one line on stderr and exit code 1; Ctrl-C is 130, and says whether the work can go on."""

    def main(self, *args: Any, **rest: Any) -> Any:
        """The whole program."""
        streams.make_usable()
        try:
            return super().main(*args, **rest)
        except OSError as error:  # of --help, say, into a full disk
            _complain(error.strerror or str(error))
            sys.exit(1)

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """With the two options that all commands have."""
        cmd.params += [
            _level("quiet", "q", "Warnings and errors only."),
            _level("verbose", "v", "A line for every layer."),
        ]
        super().add_command(cmd, name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """In the order in which they are used."""
        for title, names in SECTIONS.items():
            with formatter.section(title):
                room = formatter.width - 4 - max(map(len, self.commands))
                formatter.write_dl([(name, self.commands[name].get_short_help_str(room)) for name in names])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; ends the process with exit code 1 if it fails, 130 if it is interrupted."""
        signal.signal(signal.SIGTERM, _stop)
        try:
            done = super().invoke(ctx)
            ranks.leave()
            streams.flush()
            return done
        except QuantkitError as error:
            _complain(str(error))
        except KeyboardInterrupt:
            goes_on = ctx.invoked_subcommand in RESUMING
            _complain("interrupted" + ("; what is done is kept, and the same command goes on" if goes_on else ""))
            ranks.end(INTERRUPTED)
            sys.exit(INTERRUPTED)
        except BrokenPipeError:  # whoever read our output has seen enough
            streams.forget()
            ranks.end(READER_GONE)
            sys.exit(READER_GONE)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            _complain(f"{where}{error.strerror or error}")
        except Exception as error:
            if what := out_of_memory(error):
                _complain(
                    f"out of {what}; what is done is kept: free some, or use fewer --threads, and run the same "
                    "command again (fewer --tokens need --restart)"
                )
            elif ranks.count() == 1 or isinstance(error, click.exceptions.Exit):
                raise
            elif ranks.may_speak():
                if isinstance(error, click.ClickException):
                    raise
                traceback.print_exc()
        ranks.end(1)
        sys.exit(1)


def _complain(message: str) -> None:
    """One line, from the first rank that has one."""
    if ranks.count() > 1:  # the launcher, which has seen another rank end, must not cut this one short
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if ranks.may_speak():
        where = f"rank {ranks.index()}: " if ranks.index() else ""
        click.echo(f"quantkit: {where}{printable(message)}", err=True)


def _stop(*_: object) -> None:
    """SIGTERM ends a run as Ctrl-C does; a second one ends it at once."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise KeyboardInterrupt


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="quantkit")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Dynamic low-bit GGUF files of DeepSeek-R1 and its family.

    \b
    quantkit make --recipe 1.58bit            # the bundled tiny-r1: a minute or two
    quantkit plan deepseek-r1 --size 150GB    # sizes and types; needs no weights
    quantkit make deepseek-ai/DeepSeek-R1 --recipe 1.58bit -o r1 --dry-run
    quantkit run tiny-r1-1.58bit -p "It was a dark and stormy"
    """
    warnings.filterwarnings("ignore", message=".*beta state.*")
    machine.bound_threads()
    writable_caches()
    if ctx.invoked_subcommand in TOGETHER:
        ranks.join()
    if ranks.launched_index():
        if ranks.index() == 0:
            ctx.exit(0)
        progress.be_quiet()
        sys.stdout = open(os.devnull, "w")
