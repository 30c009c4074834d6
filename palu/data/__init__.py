"""Turn text and spans into tokens and roles.

``files.py`` reads files, ``rows.py`` checks columns and spans and renders the chat template,
``secret.py`` finds secrets in answers by ``matching.py``, ``duplicates.py`` finds what is given twice,
``tokenize.py`` makes tokens with labels, ``examples.py`` puts these together, and ``packing.py`` lays many examples
into one sequence.

Each token has one label, aligned with `input_ids` (the loss shifts, not the labels):

| label       | forget                                | retain          |
|-------------|---------------------------------------|-----------------|
| IGNORE      | prompt, padding: nothing acts on it   | the same        |
| ORDINARY    | answer token outside every span: KL   | never           |
| token's id  | sensitive: the token overlaps a span  | an answer token |

docs/data.md lists the forms of a row and what the model reads of each, every column, who reads it, and the errors.

The answer ends with an end-of-sequence token, ORDINARY in forget: the template's own (such as <|eot_id|>),
else the tokenizer's; of a prompt that is rendered already, a special token at the end of the completion.

The whole text is tokenised at once, as the model will read it, so the border between prompt and
answer or the edge of a span may lie inside a token: a token belongs to the answer, or to a span, as
soon as it holds one character of it. Blanks at a span's edges do not count; those within it do, or
"June 30, 1975" would fall apart where a tokenizer makes " " and "30" two tokens.
"""

from palu.data.examples import Examples, load_forget, load_retain
from palu.data.files import DataError
from palu.data.tokenize import IGNORE, ORDINARY, Example

__all__ = ["IGNORE", "ORDINARY", "DataError", "Example", "Examples", "load_forget", "load_retain"]
