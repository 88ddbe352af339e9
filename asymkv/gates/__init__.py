"""Small networks that tell from a row alone how much KVzip would value it."""
