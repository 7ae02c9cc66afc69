"""Certificate authority, join tokens, certificates and roles: who may connect, under which name, to do what."""
