"""Write the frozen reference of `test_tokenizer_parity.py`: what OpenCLIP's tokenizer makes of many texts.

    python tests/parity/make_tokens.py

needs what `make_clip.py` needs. `clip_tokens.json` holds "about" and "ids": text to the ids up to its end token, of 77.
"""

from __future__ import annotations

import argparse
import json
import random
import unicodedata
from importlib.metadata import version
from pathlib import Path

if __name__ == "__main__":  # before torch, which takes seconds to import, where it is installed
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

from open_clip.tokenizer import SimpleTokenizer
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

HERE = Path(__file__).parent

TEXTS = [
    "",
    " ",
    "a",
    "*",
    "a photo of a cat",
    "A Photo Of A CAT",
    "  two   blanks\tand\na line\r\n ",
    "hello world!!!",
    "it's, we're, I've, I'm, they'll, he'd, don't",
    "IT'S WE'RE I'VE I'M THEY'LL HE'D DON'T",
    "'s't're",
    "''s",
    "' s",
    "rock 'n' roll",
    "dogs' bowls",
    "“curly” ‘quotes’ it’s",
    "1234567890 3.14 -5 1,000,000 2nd 0x1F",
    "v2.0.1-beta",
    "½ ² Ⅷ ٣ 三",
    "a*b*c ** *** *",
    "#hashtag @user http://example.org/a?b=c&d=e#f",
    "me@example.org",
    "C++ & C# <b>bold</b>",
    "snake_case camelCase",
    "AT&amp;T",
    "&lt;p&gt; &amp;lt; &amp;amp;lt; &quot;x&quot; &#39;s &eacute; &nbsp;x &notanentity; &",
    "fish &amp; chips",
    "<start_of_text> a <end_of_text",
    "<|startoftext|> a <|endoftext|>",
    "[CLS] [SEP] <s> </s>",
    "café naïve Zürich Ærøskøbing",
    "cafe\u0301 nai\u0308ve",
    "İstanbul ISTANBUL ıspanak",
    "ΟΔΥΣΣΕΥΣ Σίσυφος",
    "ſ 'ſ ß ẞ ﬁ ﬂ ﬆ 'ﬆ Å K",
    "Привет, мир! Ёж",
    "こんにちは世界。カタカナ ｶﾀｶﾅ",
    "你好，世界！",
    "안녕하세요 세계",
    "שלום עולם",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "😀 😃😄 👍🏽 👨‍👩‍👧‍👦 🇩🇪 ❤️ ☃",
    "a😀b",
    "∑ ∫ √ ≤ ∞ → €£¥ © ® ™",
    "…—–‐",
    "x\u00a0y\u2003z\u200bw\u2028v\ufeffu",
    "a\x00b\x07c\x1bd",
    "\x85\x1c",
    "sch√∂n â€œmojibakeâ€\x9d Ã©tÃ© cafÃ©",
    "l‚Äôhumanit√©",
    "full ｗｉｄｔｈ ＡＢＣ１２３",
    "zalgo h̷e̷l̷l̷o̷",
    "\ufffd \U0001f9ff \U00020000",
    "aaaaaaaaaaaaaaaaaaaaaaaa",
    "abcabcabcabcabc",
    "!!!???...!!!",
    "-----====++++",
    "ab1c2d3",
    "supercalifragilisticexpialidocious",
    "pneumonoultramicroscopicsilicovolcanoconiosis antidisestablishmentarianism",
    "line one\nline two\n\nline four",
    " ".join(f"word{i}" for i in range(200)),
    "x" * 400,
    "🦄" * 60,
    "one " * 74,
    "one " * 75,
    "one " * 76,
]


def random_texts(count: int, longest: int, seed: int = 0) -> list[str]:
    """Characters of all kinds, and among them those that cleaning and splitting look at."""
    rng = random.Random(seed)
    known = [chr(i) for i in range(0x30000) if unicodedata.category(chr(i))[0] in "LNPSZ"]
    telling = "  '''smtd0129aAéß&;#<>*_.!…’“”\n"

    def one() -> str:
        alphabets = (telling, telling + "reving", known)
        return "".join(rng.choice(rng.choice(alphabets)) for _ in range(rng.randrange(longest)))

    return [one() for _ in range(count)]


def main() -> None:
    """Write the file."""
    tokenizer = SimpleTokenizer()
    prompts = [OPENAI_IMAGENET_TEMPLATES[i % 80](name) for i, name in enumerate(IMAGENET_CLASSNAMES) if i % 25 == 0]
    texts = TEXTS + prompts + random_texts(40, 30)
    ids = {text: row[: row.index(tokenizer.eot_token_id) + 1] for text in texts for row in tokenizer(text).tolist()}
    about = {"open_clip_torch": version("open_clip_torch"), "ftfy": version("ftfy"), "regex": version("regex")}
    lines = ",\n".join(f"{json.dumps(text)}: {json.dumps(row, separators=(',', ':'))}" for text, row in ids.items())
    path = HERE / "clip_tokens.json"
    path.write_text(f'{{"about": {json.dumps(about)}, "ids": {{\n{lines}\n}}}}\n')
    print(f"{path.name}: {len(ids)} texts, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
