import pickle

import pytest

from serve_app.domain import errors
from serve_app.domain.errors import DeadlineExceeded, RotundaError, error_from_dict

OURS = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RotundaError)}
LEAVES = sorted((kind for kind in OURS if not OURS & set(kind.__subclasses__())), key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.__name__)
def test_an_error_crosses_processes_as_data_and_by_pickle(kind: type[RotundaError]) -> None:
    error = kind("words", "ollama", True, {"retryAfterS": 3})
    for copy in (error_from_dict(error.to_dict()), pickle.loads(pickle.dumps(error))):
        assert type(copy) is kind
        assert copy.to_dict() == error.to_dict()
        assert copy.retry_after_s == 3


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes() -> None:
    assert errors.__doc__ is not None
    for kind in LEAVES:
        line = next(line for line in errors.__doc__.splitlines() if f" {kind.__name__} " in line)
        assert kind.code in line and str(kind.status) in line


def test_codes_are_unique_among_the_leaves() -> None:
    assert len({kind.code for kind in LEAVES}) == len(LEAVES)


def test_only_the_early_timeouts_may_be_tried_again() -> None:
    phases = ("load", "connect", "first token", "idle", "total")
    assert [DeadlineExceeded.during(phase, 1).retryable for phase in phases] == [False, True, True, False, False]


def test_an_unknown_code_is_kept_as_an_internal_error() -> None:
    error = error_from_dict({"code": "FROM_THE_FUTURE", "message": "words"})
    assert (error.code, error.message) == ("INTERNAL", "words")
