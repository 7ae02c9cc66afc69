"""The page: runs, rounds and the fleet in a browser (extra `fedgrpc[web]`). Nothing else imports it."""
