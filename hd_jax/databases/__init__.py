"""Databases of token continuations: built and bounded on the host with numpy, kept in files, exported to the device.

    frequent_ngrams     the most frequent n-grams of the model's own answers (HD's D_m)
    ngram_trie          n-gram statistics of a corpus, without its text (HD's D_s)
    suffix_array        a corpus as running text (HD's D_s, REST, SuffixDecoding; the model's own answers)
    trigrams            the likeliest successors of token pairs (ADED)
    continuation_table  on the device: the best continuations of the last tokens (hd)
    successor_table     on the device: the likeliest next tokens, with probabilities (hd_tree, ADED)
    pair_overlay        on the device: successors of token pairs, as they were changed while decoding (ADED)
    files               the container that all of them are kept in

A database is built from documents: arrays int32[n] of token ids, each a piece of running text. No n-gram crosses from one
document into the next, nor a SEPARATOR within one (between the turns of a chat, say).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SEPARATOR = -6  # between and within documents; equal to no token, and to no sentinel of `draft_tree`


def join_documents(documents: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Lays documents end to end, a SEPARATOR after each.

    Args:
      documents: int32[n_d] each, token ids or SEPARATOR.

    Returns:
      The text int32[n], and the end of each document in it, int64[D] (the place of its closing SEPARATOR).

    Raises:
      ValueError: a document is not a list of token ids.
    """
    lengths = np.array([len(document) for document in documents], np.int64)
    ends = np.cumsum(lengths + 1) - 1
    text = np.full(int(np.sum(lengths + 1)), SEPARATOR, np.int32)
    if len(text) >= 2**31:
        raise ValueError(f"{len(text)} tokens do not fit in a database; at most {2**31 - 1} do")
    for index, (document, end, length) in enumerate(zip(documents, ends, lengths, strict=True)):
        tokens = np.asarray(document)
        if tokens.ndim != 1 or (length and not np.issubdtype(tokens.dtype, np.integer)):
            raise ValueError(
                f"document {index} is {tokens.dtype}{list(tokens.shape)}; a document is a list of token ids, int32[n]"
            )
        if length and (tokens.max() >= 2**31 or np.any((tokens < 0) & (tokens != SEPARATOR))):
            raise ValueError(
                f"document {index} holds an id that is neither a token (0 to 2^31 - 1) nor SEPARATOR ({SEPARATOR})"
            )
        text[end - length : end] = tokens
    return text, ends
