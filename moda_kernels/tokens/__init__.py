"""Who is who and who sees whom: layouts, masks, pseudo scores, tiles."""
