"""The texts of the layout that depend on the tree's structure alone: made once per structure, not per save."""

import json
from functools import cache, lru_cache
from typing import Any

import tensorstore as ts

Path = tuple[str, ...]


@cache
def _of_dtype(dtype: str) -> dict[str, Any]:
    """Return zarr's metadata of an array of a dtype, as the installed tensorstore writes it."""
    one_byte = dtype == "bool" or ts.dtype(dtype).numpy_dtype.itemsize == 1
    codec: dict[str, Any] = {"name": "bytes"} | ({} if one_byte else {"configuration": {"endian": "little"}})
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "memory"},
        "metadata": {"shape": [], "data_type": dtype, "codecs": [codec]},
    }
    made: Any = ts.open(spec, create=True, context=ts.Context()).result()
    text: dict[str, Any] = json.loads(made.kvstore.read("zarr.json").result().value)
    return text


@cache
def array_text(dtype: str, shape: tuple[int, ...], chunk: tuple[int, ...]) -> bytes:
    """Return the zarr.json of an array."""
    grid = {"name": "regular", "configuration": {"chunk_shape": chunk}}
    return json.dumps(_of_dtype(dtype) | {"shape": shape, "chunk_grid": grid}).encode()


@lru_cache(8)
def tree_text(paths: tuple[Path, ...]) -> str:
    """Return the _METADATA of a tree of nested dicts with arrays at these paths.

    All are said to be of numpy's: whoever restores without a target gets them so, on whatever devices he has. Of JAX's
    arrays Orbax would want to know where they lay.
    """
    tree = {
        str(path): {
            "key_metadata": [{"key": name, "key_type": 2} for name in path],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
        for path in paths
    }
    return json.dumps(
        {
            "tree_metadata": tree,
            "use_ocdbt": True,
            "use_zarr3": True,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
    )
