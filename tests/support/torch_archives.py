"""Small files of `torch.save`, made by PyTorch, for tests that do without it."""

import base64
import zlib
from pathlib import Path

OLDER_FORMAT = (
    "c-n1GJx{|h5OqG9f}y1=8)I22h+3gebU<A!zRKbSMIo_TBP;INP7z3zGF8BDU|{60@e`03xU@oI!1A5!ckk}qtNd50zTd`Q2lpRW`@PCP{|qoM"
    "fpmF?5HdH~=}fC+A&ix}01pYgg%u^8Qz8*XF4F@1XHF4xk8_b&`6Mg^O9;EXfuNmf<DkKO9^g+F4k8xvu%4ldDKuGFmcN=FqA7Sw@Yl}=2r{Ql"
    "HtQv&lgiS>h`Um%JaMA1+9ZpZqD+@JYaL{!Qvr=l3mq$+x|<D1A>wW14Ex7%f7l-k;-mN^hUR*uY+k|^i!K~&Uo*l2=C6P<j|D5(dCAbd5}8Bu"
    "mR_1%7?GdJ%u(1qoIuM#djflQy=?&<=G9hif&8cDrM-y!J=H0u5nhZ6<9+l4x@~IU"
)
"""`torch.save({"a": {"w": arange(6.).reshape(2, 3).t()}, "n": 1}, ..., _use_new_zipfile_serialization=False)`."""
ARCHIVE = (
    "c-p0uKX21O7{<?bY6nA;v`b2duDAly#7S%i1gRqA#RH)TDe7Xm&Jiq}xMyEdfmA61QHhN*Fe1JM6Q2RWjKsizm^!m@XM<}yG_>^O^ZCy`@BRGV"
    "^SWzrIRNr`Fw;t48Cbsk$eF;6zJ;yI?qgT)6u@?>P1$_}q#i>A7Gm}h8(!`q&c+@QSIjYX+(0yaxHER#zKP)|@O*P3izp{aJ%LOP$V_Vh(Ly8<"
    "b=R}-{pg{H_%L7<2|bRC_U;(v4IZNl_Y7cg277=+gE6=Rbn&Had#(#@?0BO<yzBR&5Bql<8;j`D`W9NmsIY~KK^Sg?N(M8obPXXdKl}Oh19?Py"
    "_rzqB!R<I1m4}``w6HmWen8gJJ2x^pIZLZihWAHbo>MGlF2gENj~RX^&9q!+FdD)U);sn8!B83$puLBFuw)5#F2E9K#{fG|F!X4S_0G+6eEzoU"
    "VC+K5@Z#3D%RE_ypUY54Yy@@XM)iF8kD^Z7<g`f+(x;@q+oVM0SKkj;$cvS^L`85lCW<X_<+Mn3k*@UV?cl+`^S=h<V*`XAA3)zB4tQ!&)0<9T"
    "?^Mp1i&|5awOXsytktw;Luu5jvQkxAn%YpStwvo{T8gI0ib^Sm>qnm@!Xbr}426w3lVwzzA<zCtvg%|3lvBz@2AouQ*&s<1ucm?=CWFjWPBu=`"
    "h)bzB%Pg2JfUG>}nnFtch6Ne#X0=Hl6jNG>16h}4#mVhiONn16#D6zV*WmeUe{9BGkCj4Z{K!P3mWxKB3ttI*bRYe}7Whabg!7}hzW^VxW?T"
)
"""The same in the current format."""


def write_torch_file(path: Path, fixture: str = ARCHIVE) -> Path:
    """Write one of the files."""
    path.write_bytes(zlib.decompress(base64.b85decode(fixture)))
    return path
