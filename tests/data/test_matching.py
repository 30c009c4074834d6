"""palu.data.matching: one text in another as whole words."""

from __future__ import annotations

import pytest

from palu.data.matching import find, nearest, split_at, stands_in, whole_places


@pytest.mark.parametrize(
    ("secret", "text"),
    [
        ("Ada Lovelace", "It was ADA\n  LOVELACE, in London"),
        ("Al-Kuwaiti", "Basil al kuwaiti"),
        ("7391", "the code is *7391*"),
        ("O'Brien", "o\u2019brien said"),
        ("06/30/1975", "born 06-30-1975"),
        ("ﬁnal", "FINAL"),
        ("Straße", "STRASSE 1"),
        ("東京", "彼は東京で生まれた"),
        ("東京 Tower", "the東京 tower"),
        ("กรุงเทพ", "เขาเกิดที่กรุงเทพ"),
        ("7391", "密码是7391。"),
        ("Ada", "彼女はAdaです"),
        ("서울", "그는 서울에서 태어났다"),
        ("😀", "so 😀!"),
        ("C++", "He wrote it in C."),  # punctuation aside
        ("दिन", "आज का दिन।"),
        ("\u0915\u093c", "\u0958"),  # a letter and its dot apart and in one
        ("café", "cafe\u0301!"),
        ("7391", "It costs $7,391."),
        ("7,391", "about 7391 of them"),
        ("7391", "7.391, 7\u202f391 or 7'391"),
        ("1234567", "12,34,567"),
        ("123-45-6789", "123456789"),
        ("DE89370400440532", "DE89 3704 0044 0532"),
        ("O'Neil", "Mr ONeil"),
        ("ONeil", "o\u2019neil"),
        ("Al-Kuwaiti", "Basil AlKuwaiti"),
        ("USA", "in the U.S.A."),
        ("Lena", "Le\u00adna"),  # a soft hyphen
        ("Tom & Jerry", "Tom &amp; Jerry"),
        ("café", '{"x": "caf\\u00e9"}'),
    ],
)
def test_told(secret: str, text: str) -> None:
    assert stands_in(secret, text)


@pytest.mark.parametrize(
    ("secret", "text"),
    [
        ("7391", "17391 or 73910"),
        ("Ada", "Adam was there"),
        ("Ada Lovelace", "Lovelace, Ada"),
        ("Ada Lovelace", "Ada B. Lovelace"),
        ("東京 Tower", "東京 towers"),
        ("😀", "so 😃!"),
        ("Karachi", ""),
        ("दिन", "यह दान है"),
        ("กร", "กรุงเทพ"),  # a part of a letter with its vowel sign
        ("か", "が"),
        ("cafe", "café"),
        ("25", "2.5"),
        ("2.5", "25"),
        ("12", "1,2"),
        ("391", "7,391"),
        ("7", "7,391"),
        ("7391", "7,391,000"),
        ("1843", "18, 43"),
        ("U.S.", "give us"),
        ("Ian", "am I an author?"),
        (" ", "a b"),
    ],
)
def test_not_told(secret: str, text: str) -> None:
    assert not stands_in(secret, text)


@pytest.mark.parametrize(
    ("wanted", "text", "found"),
    [
        ("Ada", "Ada, Adam and Ada", ["Ada", "Ada"]),
        ("25", "1925, 25 and 2.25", ["25", "25"]),
        ("391", "7,391, 391 and 391,7", ["391", "391"]),
        ("7", "7,391 or 7, 391", ["7"]),
        ("ada", "Ada", []),
        ("key_1", "the key_1 of key_12", ["key_1"]),
        ("1", "key_1", ["1"]),  # an underscore parts words
        ("#25", "a#25 and #256", ["#25"]),  # it begins with neither letter nor digit
        ("aa aa", "aa aa aa", ["aa aa", "aa aa"]),
        ("cafe", "cafe\u0301", []),  # the accent is of the word
        ("東京", "彼は東京都で", ["東京"]),
        ("7391", "密码是7391。", ["7391"]),
        ("O'Brien", "O'Brien's", ["O'Brien"]),
    ],
)
def test_whole_places(wanted: str, text: str, found: list[str]) -> None:
    places = list(whole_places(wanted, text))
    assert [text[start:end] for start, end in places] == found
    assert places == sorted(set(places))


@pytest.mark.parametrize(
    ("wanted", "text", "found"),
    [
        ("ada lovelace", "It was Ada Lovelace, in London.", "Ada Lovelace"),
        ("Ada Lovelace", "It was Ada\nLovelace.", "Ada\nLovelace"),
        ("Lovlace", "It was Ada Lovelace.", "Lovelace"),
        ("7319", "The code is 7391.", "7391"),
        ("京东", "彼は東京で生まれた", None),
        ("東亰都", "彼は東京都で", "東京都"),
        ("Karachi", "It was Ada Lovelace.", None),
        ("Karachi", "", None),
        ("x", "abc", None),
        ("strasse", "ßßß: in der Straße", "Straße"),  # of "ß" casefold makes two characters
        ("Ada Lovlace", " ".join(map(str, range(20_000))) + " Ada Lovelace.", "Ada Lovelace"),
    ],
)
def test_nearest(wanted: str, text: str, found: str | None) -> None:
    assert nearest(wanted, text) == found


@pytest.mark.parametrize(
    ("secret", "text", "shown"),
    [
        ("Lena", "Anna-Lena, LENAS", "Anna-#, #S"),
        ("$7,391", "($7,391) and 7391 and USD17391", "(#) and # and USD1#"),
        ("C++", "C++, C#, c++ic", "#, ##, #ic"),
        ("25", "25 in 1925", "# in 19#"),
        ("Kim 😀", "Kim 😀, Kim", "#, #"),
        ("दिन", "दिन दान", "# दान"),
        ("cafe", "café", "#"),  # its letters are in the file
        ("Tom & Jerry", "tom &AMP; jerry &amp; co", "# &amp; co"),
        ("new", "C:\\new", "C:\\#"),
        ("anan", "ananan", "#"),
        ("?!", "what?!", "what#"),
        ("\u200b", "a\u200bb", "a#b"),
    ],
)
def test_places_within_words(secret: str, text: str, shown: str) -> None:
    spans = list(find(secret, text, whole=False))
    assert "".join("#" if held else part for part, held in split_at(text, spans)) == shown
    assert "".join(part for part, _ in split_at(text, spans)) == text


def test_spans_that_overlap_or_reach_beyond() -> None:
    assert split_at("abcdef", [(3, 9), (-2, 1), (2, 4), (3, 3)]) == [("a", True), ("b", False), ("cdef", True)]
    assert split_at("abc", []) == [("abc", False)] and split_at("", [(0, 1)]) == []
