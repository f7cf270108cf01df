import io

from rich.console import Console

from granet.cli.progress import Watcher, shorten


def test_names_are_shortened_in_the_middle():
    assert shorten("digits-granet-3f9a1c", 20) == "digits-granet-3f9a1c"
    for width in (20, 26, 40):
        short = [shorten(f"{'long-' * 20}{level}of3-724aaf", width) for level in (1, 2)]
        assert len(set(short)) == 2 and {len(name) for name in short} == {width}
        assert all(name.startswith("long") and name.endswith("of3-724aaf") for name in short)


def test_the_progress_of_long_names_is_told_apart_in_80_columns():
    lines = []
    for level in ("1of3-53.58", "2of3-78.46"):
        console = Console(file=io.StringIO(), force_terminal=True, width=80)
        with (
            Watcher(
                f"digits-with-a-very-long-name-of-its-own-9bf84d-ticket-0ep-global-{level}-724aaf", console
            ) as watch,
            console.capture() as capture,
        ):
            console.print(watch._bar.get_renderable())
        lines.append(capture.get())
    assert lines[0].split()[0] != lines[1].split()[0]
