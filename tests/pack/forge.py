"""Makes packed files that lie but whose digests are right: what someone who knows the format could write."""

import hashlib
import json

ZEROS = "0" * 64


def split(data):
    """(header object, payload bytes)."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def seal(header, payload):
    """A file of this header (an object, or text or bytes of text_of) and payload, digests filled in."""
    header = text_of(header) if isinstance(header, dict) else header
    head = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    head = head.replace(b'payload_sha256":"' + ZEROS.encode(), b'payload_sha256":"' + _sha(payload))
    head = head.ljust(-(-len(head) // 8) * 8)
    raw = len(head).to_bytes(8, "little") + head
    return raw.replace(b'"digest":"' + ZEROS.encode(), b'"digest":"' + _sha(raw), 1) + payload


def text_of(header):
    """JSON text of a header object with both digests zeroed, for edits that no object can hold."""
    header["__metadata__"] |= {"digest": ZEROS, "payload_sha256": ZEROS}
    return json.dumps(header, ensure_ascii=False, separators=(",", ":"))


def overwrite(path, data):
    """New content in place. Emptying a file first, as write_bytes does, makes ext4 wait for the disk."""
    with open(path, "r+b") as file:
        file.write(data)
        file.truncate()


def _sha(data):
    return hashlib.sha256(data).hexdigest().encode()
