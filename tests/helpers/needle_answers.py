"""Answers to questions of the embedded benchmark, read off the cells: nothing shared with the generator."""

from hybridvlm.tiny import tiles


def derive(video, text):
    """Answer a question in words by looking through the cells one by one: nothing shared with the generator."""
    compound, second, kind, mark = text.split()
    assert mark == "?"
    colour, time = compound.split("@")
    colours, classes, tags = list(tiles.BORDERS), list(tiles.CLASS_OF_LABEL.values()), list(tiles.TAGS)

    def find(t):
        cells = [c for c in range(16) if colours[video.border[t][c]] == colour]
        assert len(cells) == 1
        return cells[0]

    t1 = int(time[1:])
    cell = find(t1)
    number = int(video.tag1[t1][cell]) * 8 + int(video.tag2[t1][cell])
    assert (second == "none") == (kind != "class-at")
    hop1, one_hop = t1 * 16 + cell, (-1, -1, -1, -1)
    if kind == "what":
        return classes[video.label[t1][cell]], (hop1, *one_hop)
    if kind == "where":
        return f"c{cell}", (hop1, *one_hop)
    if kind in ("tag1", "tag2"):
        return tags[getattr(video, kind)[t1][cell]], (hop1, *one_hop)
    if kind == "class-at":
        t2, place, extra = int(second[1:]), cell, (cell, -1)
    elif kind == "class-pointed":
        t2, place, extra = number, cell, (cell, -1)
    else:
        assert kind == "class-same"
        t2, place, extra = number, find(number), (-1, colours.index(colour))
    assert t2 != t1, "the second look-up must lie in another frame"
    return classes[video.label[t2][place]], (hop1, t2 * 16 + place, t2, *extra)
