from timm_iebn.messages import describe, shorten


def test_messages_are_one_paragraph_of_500_characters():
    assert shorten("a\n  b") == "a b" and shorten(ValueError("x")) == "x"
    assert len(shorten("x" * 10**6)) <= 500 and shorten("x" * 501).endswith("[...]") and shorten("y" * 500) == "y" * 500
    assert describe(ValueError("a\nb")) == "ValueError: a b" and describe(EOFError()) == "EOFError: no details"
