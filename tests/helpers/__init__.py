"""What several tests share: small models, scripts as modules, damaged files."""
