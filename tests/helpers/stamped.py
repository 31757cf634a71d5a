"""Clips that say which frame is which."""

import av
import numpy as np

FRAMES, HEIGHT, WIDTH, BITS = 61, 64, 96, 8


BLOCK = WIDTH // BITS


def stamped(path, *, gop=30, b_frames=3, open_gop=False, codec="libx264", rotation=0, options=None, frames=FRAMES):
    """A clip whose frame k carries k in black and white blocks along the top, over moving noise."""
    settings = {"g": str(gop), "keyint_min": str(gop), "bf": str(b_frames)}
    if codec == "libx264":
        settings |= {"preset": "veryfast", "x264-params": f"scenecut=0:open-gop={int(open_gop)}"}
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=25, options=settings)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for k in range(frames):
            noise = np.random.default_rng(k).integers(0, 60, (HEIGHT, WIDTH, 3)).astype(np.uint8)
            bits = (k >> np.arange(BITS)) & 1
            noise[:16] = np.repeat(255 * bits, BLOCK)[None, :, None]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode())
    return path
