"""The page at `/`: drop a film, ask, see where the answer looked. Plain files, none from other hosts."""
