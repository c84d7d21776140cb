"""One table as an Excel workbook, the same bytes for the same rows. Texts stay texts: no formula, link or number."""

import datetime
import io
import re
import zipfile
from collections.abc import Sequence

from vlmdist.errors import UserError

MAX_CELL_CHARACTERS = 32_767
"""Of one cell, in Excel."""
MAX_ROWS = 1_048_576
"""Of one sheet, the header among them."""

_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
"""Characters that no XML file may hold; models write them."""
_MADE = datetime.datetime(2000, 1, 1)  # the same in every file, so that bytes can be compared


def write_workbook(header: Sequence[str], rows: Sequence[Sequence[str | int | None]], comment: bytes) -> bytes:
    """The file as bytes; None leaves a cell empty. UserError without XlsxWriter.

    comment: of the zip archive, to know the file again.
    """
    try:
        import xlsxwriter
    except ImportError:
        raise UserError(
            "a workbook needs XlsxWriter: pip install 'vlmdist[vlmevalkit]', or write a .tsv (PRED_FORMAT=tsv)"
        ) from None
    buffer = io.BytesIO()
    with xlsxwriter.Workbook(buffer, {"in_memory": True}) as workbook:
        workbook.set_properties({"created": _MADE})
        sheet = workbook.add_worksheet()
        for row, cells in enumerate([header, *rows]):
            for column, value in enumerate(cells):
                if isinstance(value, int):
                    sheet.write_number(row, column, value)
                elif value is not None:
                    sheet.write_string(row, column, _as_cell(value))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = comment
    return buffer.getvalue()


def _as_cell(text: str) -> str:
    # a carriage return is written as _x000D_, which Excel reads back and pandas doesn't
    return _NOT_XML.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))
