"""Shapes in signatures, by one glossary of axis letters: `x: Float[Array, "B L D"]`.

B batch · L tokens · M visual tokens · T text tokens · D model width · H heads · K kv heads · P head width (Q that of values, where it
is another) · G SSM groups · N SSM state · C chunk · F frames · V vocabulary · S segments of a row · W taps of a convolution.
Two letters are one axis that both fill (HP), "..." is any number of axes. A letter has one size in a signature; standing alone it
has a space before it (" H"), since linters take a bare word for a name.

Type checkers see plain arrays. Modules import this for type checking alone, so that the library runs without jaxtyping; a test holds
signatures against real arrays.
"""

from jaxtyping import Array, Bool, Float, Int, Shaped

__all__ = ["Array", "Bool", "Float", "Int", "Shaped"]
