"""Sources of rows, read a chunk at a time: files of tables and arrays, images, tables in memory and data sets."""

from vbdl.batch.sources.array_file import ArrayFile as ArrayFile
from vbdl.batch.sources.image_folder import ImageFolder as ImageFolder
from vbdl.batch.sources.image_folder import ImageRow as ImageRow
from vbdl.batch.sources.in_memory import DatasetSource as DatasetSource
from vbdl.batch.sources.in_memory import MemoryTable as MemoryTable
from vbdl.batch.sources.source import Chunk as Chunk
from vbdl.batch.sources.source import Source as Source
from vbdl.batch.sources.table_file import TableFile as TableFile
