"""How the names of video files end. Imports nothing."""

FILMS = (
    ".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv",
    ".ts", ".vob", ".webm", ".wmv"
)  # fmt: skip
"""Files whose names end so, in either case, are films. FFmpeg's own list includes sound, pictures and subtitles."""
