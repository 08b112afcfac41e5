"""What an engine makes of the time that its dispatches took: when the next is sent, and how long it may be."""

from infer.throughput import Throughput


def test_time_is_spare_until_most_of_what_runs_has_run():
    throughput = Throughput()
    assert throughput.spare_seconds(throughput.clock(), 8) == 0
    throughput.last_steps = 20.0, 10.0
    assert 13 < throughput.spare_seconds(throughput.clock(), 2) < 14.01  # of the shorter, and long ago
    assert throughput.spare_seconds(throughput.clock() - 15, 2) == 0


def test_slow_steps_are_fewer_to_a_dispatch():
    throughput = Throughput()
    assert throughput.steps_of_a_dispatch(8) == 8  # nothing is known
    steps = []
    for seconds in (0.001, 0.001, 0.02, 0.02, 1.0, 1.0):
        sent = throughput.clock() - 2 * seconds
        throughput.last_read = sent
        throughput.count_decode(sent, 2, 2)
        steps.append(throughput.steps_of_a_dispatch(8))
    assert steps == [8, 8, 8, 2, 2, 1]


def test_chunks_of_slow_prompts_are_shorter_while_others_decode():
    throughput = Throughput()
    assert throughput.tokens_of_a_chunk() is None  # nothing is known

    def after(seconds: float, tokens: int) -> int:
        sent = throughput.last_read = throughput.clock() - seconds
        throughput.count_prefill(sent, tokens, 0)
        return throughput.tokens_of_a_chunk()

    assert after(5.0, 16) == 64  # the least
    assert 290 < after(5.0, 512) < 308 > after(5.0, 16) > 290  # a short prompt says little
    assert after(0.01, 512) > 10_000
