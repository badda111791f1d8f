"""Tables in Markdown, a row as soon as it is known."""


def line(*cells):
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def header(caption, *cells):
    print(f"{caption}\n")
    line(*cells)
    line(*("---" for _ in cells))
