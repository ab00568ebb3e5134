"""Augmentations against a table by hand, and their inverses on any grid."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_engine import InputError
from seal_engine.domains.few_shot.arc import Example, Grid, Task
from seal_engine.domains.few_shot.augmentations import (
    BASIC,
    CHAIN,
    FARTHEST,
    IDENTITY,
    REPEAT,
    SIZE,
    Chain,
    Mirror,
    NoImageError,
    Recolour,
    Repeat,
    Scale,
    Translate,
    Turn,
    random_recolouring,
    random_translation,
)


def grid(text: str) -> Grid:
    """Rows of colours, "12 34"."""
    return tuple(tuple(map(int, row)) for row in text.split())


# Of the grid 123
#             456, drawn by hand.
TABLE = {
    "rotate 90": "36 25 14",
    "rotate 180": "654 321",
    "rotate 270": "41 52 63",
    "flip up-down": "456 123",
    "flip left-right": "321 654",
    "transpose": "14 25 36",
    "mirror up": "456 123 123 456",
    "mirror down": "123 456 456 123",
    "mirror left": "321123 654456",
    "mirror right": "123321 456654",
    "scale 2 2": "112233 112233 445566 445566",
    "scale 2 1": "123 123 456 456",
    "scale 1 2": "112233 445566",
    "rotate 90, scale 2 2": "3366 3366 2255 2255 1144 1144",
    "rotate 180, scale 2 2": "665544 665544 332211 332211",
    "rotate 270, scale 2 2": "4411 4411 5522 5522 6633 6633",
    "flip up-down, scale 2 2": "445566 445566 112233 112233",
    "flip left-right, scale 2 2": "332211 332211 665544 665544",
    "transpose, scale 2 2": "1144 1144 2255 2255 3366 3366",
    "repeat 2 1": "123 456 123 456",
    "repeat 1 2": "123123 456456",
    "repeat 2 2": "123123 456456 123123 456456",
}
RECIPE = {augmentation.name: augmentation for augmentation in (*BASIC, *SIZE, *CHAIN, *REPEAT)}
SIX = grid("123 456")


def test_the_table_has_the_whole_recipe():
    assert set(TABLE) == set(RECIPE)
    assert [len(group) for group in (BASIC, SIZE, CHAIN, REPEAT)] == [10, 3, 6, 3]  # basic: a translation, too


@pytest.mark.parametrize("name", TABLE)
def test_the_table(name):
    made = grid(TABLE[name])
    assert RECIPE[name].apply(SIX) == made
    assert RECIPE[name].inverse.apply(made) == SIX
    assert RECIPE[name].inverse.inverse.apply(SIX) == made


@pytest.mark.parametrize(
    ("augmentation", "made"),
    [
        (Translate(0, 0), "123 456"),
        (Translate(1, 0), "456 123"),
        (Translate(0, 1), "312 645"),
        (Translate(1, 2), "564 231"),
        (Translate(-1, -1), "564 231"),
        (Translate(2, 3), "123 456"),
        (Translate(3, 4), "645 312"),
        (Recolour((0, 2, 1, 4, 3, 6, 5, 7, 8, 9)), "214 365"),
        (Recolour((9, 8, 7, 6, 5, 4, 3, 2, 1, 0)), "876 543"),
        (Scale(3, 1), "123 123 123 456 456 456"),
        (Repeat(1, 3), "123123123 456456456"),
        (Chain((Turn("transpose"), Mirror("left"), Translate(1, 0))), "6336 4114 5225"),
        (IDENTITY, "123 456"),
    ],
)
def test_others_by_hand(augmentation, made):
    assert augmentation.apply(SIX) == grid(made)
    assert augmentation.inverse.apply(grid(made)) == SIX


GRIDS = st.integers(1, 8).flatmap(
    lambda columns: st.lists(st.tuples(*[st.integers(0, 9)] * columns), min_size=1, max_size=8).map(tuple)
)
ONE_TO_ONE = st.one_of(
    st.sampled_from([RECIPE[name] for name in list(TABLE)[:6]]),
    st.builds(Translate, st.integers(-40, 40), st.integers(-40, 40)),
    st.permutations(range(10)).map(tuple).map(Recolour),
)
LARGER = st.one_of(
    st.sampled_from([*map(Mirror, ("up", "down", "left", "right")), *SIZE, *REPEAT]),
    st.builds(Scale, st.integers(1, 3), st.integers(1, 3)),
    st.builds(Repeat, st.integers(1, 3), st.integers(1, 3)),
)
ANY = st.one_of(ONE_TO_ONE, LARGER, st.sampled_from(CHAIN))


@given(grid=GRIDS, augmentation=st.one_of(ANY, st.lists(ANY, max_size=3).map(tuple).map(Chain)))
def test_inverses(grid, augmentation):
    made = augmentation.apply(grid)
    assert augmentation.inverse.apply(made) == grid
    assert augmentation.inverse.inverse.apply(grid) == made


@given(grid=GRIDS, augmentation=st.one_of(ONE_TO_ONE, st.lists(ONE_TO_ONE, max_size=3).map(tuple).map(Chain)))
def test_one_to_one(grid, augmentation):
    """The inverse takes any grid, not only those that were made."""
    assert augmentation.apply(augmentation.inverse.apply(grid)) == grid


@given(grid=GRIDS, augmentation=LARGER)
def test_what_was_not_made_is_not_undone(grid, augmentation):
    try:
        original = augmentation.inverse.apply(grid)
    except NoImageError:
        return
    assert augmentation.apply(original) == grid


@pytest.mark.parametrize("augmentation", [RECIPE[name] for name in TABLE if "scale" in name or "repeat 2" in name])
def test_an_odd_grid_was_not_made(augmentation):
    with pytest.raises(NoImageError, match=r"^undo .*: found a grid that"):
        augmentation.inverse.apply(grid("0"))


@pytest.mark.parametrize("side", ["up", "down", "left", "right"])
def test_what_is_no_mirror_image(side):
    for text in ("0", "12 34", "12 21 12", "121 212"):
        with pytest.raises(NoImageError, match=f"undo mirror {side}: found a grid that mirror {side} makes of none"):
            Mirror(side).inverse.apply(grid(text))


def test_augmentations_are_values():
    assert Chain((Turn("rotate 90"), Scale(2, 2))) == CHAIN[0]
    assert len({Mirror("up"), Mirror("up"), Scale(1, 2), Scale(1, 2).inverse.inverse, Scale(2, 1)}) == 3


@pytest.mark.parametrize(
    "make",
    [
        lambda: Turn("rotate 45"),
        lambda: Mirror("above"),
        lambda: Recolour((0,) * 10),
        lambda: Recolour(tuple(range(9))),
        lambda: Recolour((0.0, *range(1, 10))),  # pyright: ignore[reportArgumentType]
    ],
)
def test_what_there_is_not(make):
    with pytest.raises(InputError, match=r"^(name|side|colours): found "):
        make()


SEEDS = st.integers(0, 10**6)


@given(seed=SEEDS)
def test_random_recolouring(seed):
    """The background stays, every other colour changes, the seed decides."""
    made = random_recolouring(Random(seed))
    assert made.colours[0] == 0
    assert all(made.colours[colour] != colour for colour in range(1, 10))
    assert made == random_recolouring(Random(seed))


@given(grids=st.lists(GRIDS, min_size=1, max_size=4), seed=SEEDS)
def test_random_translation(grids, seed):
    task = Task("t", tuple(Example(one, one) for one in grids[1:]), (Example(grids[0], None),))
    made = random_translation(task, Random(seed))
    rows, columns = max(map(len, grids)), max(len(one[0]) for one in grids)
    assert 0 <= made.rows <= min(FARTHEST, rows - 1)
    assert 0 <= made.columns <= min(FARTHEST, columns - 1)
    assert (made == Translate(0, 0)) == (rows == columns == 1)
    assert made == random_translation(task, Random(seed))


def test_all_translations_are_drawn():
    task = Task("t", (), (Example(grid("123 456"), None),))
    drawn = {random_translation(task, Random(seed)) for seed in range(100)}
    assert drawn == {Translate(0, 1), Translate(0, 2), Translate(1, 0), Translate(1, 1), Translate(1, 2)}
