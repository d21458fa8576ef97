"""Times and bytes as people say them."""

from oneshot_fast.runtime.units import duration, size_text


def test_times_and_sizes_are_said_as_people_say_them() -> None:
    times = {
        0.0042: "4.2 ms",
        5: "5.0 s",
        42: "42 s",
        250: "4.2 min",
        9000: "2.5 h",
        5e5: "5.8 days",
    }
    assert {seconds: duration(seconds) for seconds in times} == times
    sizes = {12: "12 bytes", 1500: "1.5 kB", 45_000_000: "45.0 MB", 10_200_000_000: "10.2 GB"}
    assert {size: size_text(size) for size in sizes} == sizes
