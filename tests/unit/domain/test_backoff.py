from serve_app.domain.backoff import Backoff


def test_the_wait_doubles_up_to_its_cap_and_ends_with_the_tries() -> None:
    backoff = Backoff(attempts=5, base_s=1, cap_s=3)
    assert [backoff.delay_s(failures, lambda: 1.0) for failures in range(1, 6)] == [1, 2, 3, 3, None]


def test_the_jitter_is_full() -> None:
    assert Backoff(2, base_s=1).delay_s(1, lambda: 0.0) == 0.0
