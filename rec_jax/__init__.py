"""rec_jax trains large-model recommenders in JAX and Flax: text, history and IDs in; vectors, rankings and recommendations out.

The rooms, in the order in which data flows: `data` makes batches of files, `towers` makes vectors of batches, `losses` compares
vectors, `train` moves the parameters, `eval` ranks the full catalogue, `serve` answers. Importing this package imports none of them;
each has its own docstring.
"""

__version__ = "0.1.0"
